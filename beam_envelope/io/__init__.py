"""How Beam reaches files: stores for local disks, S3 and every other Beam filesystem."""
