"""The public ops: check, allocate, launch, differentiate. One op, one file."""
