"""What a recipe will cost on a device, by arithmetic: memory of every rank, time, disk, other layouts."""
