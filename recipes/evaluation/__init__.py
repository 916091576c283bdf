"""The standard evaluation of a frozen encoder, one task a file."""
