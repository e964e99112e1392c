"""What the bytes look like: key files and shards. Imports keys, no Beam."""
