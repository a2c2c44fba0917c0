"""A new copy of the program takes over from the old one: the listening socket, and all connections.

They speak over a Unix socket for packets. A message is a letter, an object of JSON, and
descriptors, by SCM_RIGHTS in unix(7):

    new  H version                  here I am
    old  L version, facts [sockets] what you need to get ready: the listening socket, and the one
                                    at which I have listened for you; how I was called
    new  R                          ready: in the sandbox, in the loop
    old  S open                     so many connections are to come; from here on both accept
    new  Y                          I have room for them
    old  B [memory, ...]            a batch, which stands still: what there is to know of each
                                    connection in the memory, its descriptors behind it
    new  T                          I have it all, and have touched nothing
    old  G                          it is yours: I have closed mine
    old  D stays [memory]           that was all; what I have counted; whether I stay
    old  O signal                   if I stay: I was sent that signal
    either  X why                   never mind: I go on with what I have

Who has a connection is never in doubt. Until T it is the old one's, which takes a batch back if the
answer is X, the end, or silence. The end of the old one without X means that it is dead: then what
the new one has said T to is its own. So whoever is killed takes with it what it has, and no more;
who is stopped, too.
"""
