"""What the benchmarks of drawing and of training share: the machine, the systems, the clock."""
