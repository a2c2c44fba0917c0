# Written by scripts/completions, from the programs' own options.
complete -c sniproxy-check -f
complete -c sniproxy-check -s C -xa '(__fish_complete_directories)' -d 'the hosts directory'
complete -c sniproxy-check -l as -xa '(__fish_complete_users)' -d 'look as that user does, whom the daemon runs as (by anybody but root: work out from modes what that user may do)'
complete -c sniproxy-check -l chroot -d 'the daemon is started with --chroot'
complete -c sniproxy-check -l handoff -d 'the daemon is started with --handoff'
complete -c sniproxy-check -l handshake -d 'ask all hosts for a TLS handshake'
complete -c sniproxy-check -l hashed -d 'the daemon is started with --hashed'
complete -c sniproxy-check -l json -d 'tell it as JSON'
complete -c sniproxy-check -l no-owner-check -d 'the daemon is started with --no-owner-check'
complete -c sniproxy-check -l pid -xa '(__fish_complete_pids)' -d 'look as that running daemon does: its user, its options, and by root its root directory and its hosts directory'
complete -c sniproxy-check -s h -l help -d 'print this'
complete -c sniproxy-check -l version -d 'print the version'

# The entries of the hosts directory, which is that of -C. Those with a dot in front are nobody's
# host. Whoever may make files may choose their names: fish quotes them.
function __sniproxy_check_entries
    set -l words (commandline -opc)
    set -l directory .
    for i in (seq 2 (count $words))
        if test "$words[$(math $i - 1)]" = -C
            set directory $words[$i]
        else if string match -qr '^-C.' -- $words[$i]
            set directory (string sub -s 3 -- $words[$i])
        end
    end
    set directory (string replace -r '^~/' "$HOME/" -- $directory)
    for path in $directory/*
        set -l name (string replace -r '(?s)^.*/' '' -- $path | string collect)
        # It would be taken for several names, or for a name and what it means.
        string match -qr '[\n\t]' -- $name; or printf '%s\n' $name
    end
end
complete -c sniproxy-check -a '(__sniproxy_check_entries)'
