"""What tests share: builders, independent computations, processes."""
