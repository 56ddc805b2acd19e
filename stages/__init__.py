"""The work: one module or package a stage, the mathematics in `diffusion`, the one training loop in `training`. Nothing here knows Prefect."""
