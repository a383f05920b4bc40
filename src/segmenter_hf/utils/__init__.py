"""What has nothing to do with segmentation: atomic files, JSON, HTTP, processes, messages."""
