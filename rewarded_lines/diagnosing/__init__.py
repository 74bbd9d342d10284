"""What works on this machine and what does not: packages, imports, engine, GPU, disks, the project file."""
