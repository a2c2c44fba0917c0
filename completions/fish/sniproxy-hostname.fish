# Written by scripts/completions, from the programs' own options.
complete -c sniproxy-hostname -f
complete -c sniproxy-hostname -l hashed -d 'the names that sniproxy --hashed opens: BLAKE3 as 64 hex digits'
complete -c sniproxy-hostname -s h -l help -d 'print this'
complete -c sniproxy-hostname -l version -d 'print the version'
