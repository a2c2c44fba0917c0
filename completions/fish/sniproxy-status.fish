# Written by scripts/completions, from the programs' own options.
complete -c sniproxy-status -f
complete -c sniproxy-status -l json -d 'tell it as JSON'
complete -c sniproxy-status -l prometheus -d 'tell it in the text format of Prometheus, for node_exporter\'s textfile collector'
complete -c sniproxy-status -l watch -d 'show it anew each second'
complete -c sniproxy-status -l most-hosts -x -d 'with --prometheus: tell of the N hosts with the most connections (default: 1000)'
complete -c sniproxy-status -s h -l help -d 'print this'
complete -c sniproxy-status -l version -d 'print the version'

# Whether the socket has still to be said: all behind it are hosts.
function __sniproxy_status_needs_socket
    set -l before
    for word in (commandline -opc)[2..]
        if not string match -q -- '-*' $word; and test "$before" != --most-hosts
            return 1
        end
        set before $word
    end
end
complete -c sniproxy-status -n __sniproxy_status_needs_socket -F
