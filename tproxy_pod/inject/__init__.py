"""tproxy-pod-inject: adds tproxy-pod to the pods of a manifest, or as a webhook to all new ones."""
