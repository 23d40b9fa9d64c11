"""The Ray Serve application: its deployments, ingress and quotas."""
