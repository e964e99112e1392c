"""Where data keys come from: KMS providers, data keys, and the caches between them and the work. Imports no Beam."""
