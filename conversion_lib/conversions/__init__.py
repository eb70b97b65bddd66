"""The conversions, one file each: what is read, planned and written. One runner runs them all."""
