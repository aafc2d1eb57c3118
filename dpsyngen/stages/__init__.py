"""Where the stages end: what programmatic images teach about denoising a reference set: python -m dpsyngen.stages."""
