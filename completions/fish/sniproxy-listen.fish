# Written by scripts/completions, from the programs' own options.
complete -c sniproxy-listen -f
complete -c sniproxy-listen -n 'test (count (commandline -opc)) -eq 1' -s h -l help -d 'print this'
complete -c sniproxy-listen -n 'test (count (commandline -opc)) -eq 1' -l version -d 'print the version'

# Behind the address it is another program's command line.
complete -c sniproxy-listen -n 'test (count (commandline -opc)) -ge 2' \
    -xa '(__fish_complete_subcommand --fcs-skip=2)'
