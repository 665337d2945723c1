"""Generated from protos/fleet.proto by `make protos`; never edited by hand."""
