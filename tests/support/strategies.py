"""Hypothesis strategies for streams: what a hello says, how it is cut, and how it is spoilt."""

from hypothesis import settings
from hypothesis import strategies as st

from tests.support import hellos

# The same examples on every run, and no clock: a busy machine must not fail a test.
steady = settings(derandomize=True, deadline=None)

# What a client may well say: any name at all (its spelling is judged elsewhere), any versions.
names = st.none() | st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1)
protocol_lists = st.lists(st.sampled_from(["h2", "http/1.1", "acme-tls/1", "x" * 255]), max_size=3)
version_lists = st.lists(
    st.sampled_from([hellos.GREASE, hellos.TLS13, hellos.TLS12, 0x0301]), max_size=4
)
unknown_extensions = st.builds(
    hellos.extension, st.sampled_from([hellos.GREASE, 10, 51, 65281]), st.binary(max_size=40)
)

# Sizes of pieces; the last one holds for all the rest (see hellos.cut).
sizes = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """A hello, in records of any size."""
    return hellos.hello_bytes(
        draw(names),
        protocols=draw(protocol_lists),
        versions=draw(version_lists),
        extra=draw(st.lists(unknown_extensions, max_size=3)),
        sizes=draw(sizes),
    )


@st.composite
def mutations(draw: st.DrawFn, stream: bytes) -> bytes:
    """The stream with a few bytes changed, taken out or put in."""
    mutated = bytearray(stream)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(mutated)))
        gone = draw(st.integers(0, 3))
        mutated[at : at + gone] = draw(st.binary(max_size=3))
    return bytes(mutated)
