"""Where a voxel is: grids, sampling, displacement fields, transforms."""
