"""The conversions, one file each: what is read, planned and written. `runner` runs all of them."""
