"""Who the other side may be, as small files say: the rules of `verify`, read as `settings` are."""

from mutual_tls.settings import SettingsError, read_names
from mutual_tls.verify import Rule, RuleError, parse_rule


def rules_in(path: str) -> list[Rule] | None:
    """Return the rules in a file or directory; None if it is absent.

    Raises:
        SettingsError: one can't be read, or understood.
    """
    try:
        return [parse_rule(text) for text in read_names(path)]
    except FileNotFoundError:
        return None
    except RuleError as error:
        raise SettingsError(path, str(error)) from None
