"""`snaploader demo`: one snapshot's life, on real input, with every claim checked.

`image.py` makes a file system image from files of this machine, `ext4.py` asks e2fsprogs about images,
`window.py` lets debugfs read out of a lazily loaded one, `story.py` tells the story.
"""
