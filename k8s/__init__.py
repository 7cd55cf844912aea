"""What is applied to a Kubernetes cluster."""
