"""Sources to manifests (`qformer prepare`), manifests to feature caches (`qformer features`)."""
