# Written by scripts/completions, from the programs' own options.
complete -c tproxy-pod-inject -f
complete -c tproxy-pod-inject -l image -x -d 'the container image; required'
complete -c tproxy-pod-inject -l secret -x -d 'the secret that has tls.crt, tls.key and ca.crt'
complete -c tproxy-pod-inject -l csi-driver -x -d 'or the CSI driver whose volume has them, such as one that makes SPIFFE identities'
complete -c tproxy-pod-inject -l csi-attribute -x -d 'an attribute of that volume; may be given several times'
complete -c tproxy-pod-inject -l egress -x -d 'the ConfigMap whose entries are those of pod/egress'
complete -c tproxy-pod-inject -l probe-address -x -d 'let it probe in plaintext, beside the node\'s own address; may be given several times'
complete -c tproxy-pod-inject -l webhook -d 'answer AdmissionReviews, over TLS'
complete -c tproxy-pod-inject -l listen -x -d 'where the webhook listens (default: :8443)'
complete -c tproxy-pod-inject -l cert -rF -d 'the certificate of the webhook'
complete -c tproxy-pod-inject -l key -rF -d 'its key'
complete -c tproxy-pod-inject -s h -l help -d 'print this'
complete -c tproxy-pod-inject -l version -d 'print the version'
