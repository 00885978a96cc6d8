"""Protocol messages, generated from `protos/` into a descriptor pool of this library's own."""
