"""What the parser of the command line refuses, as one line like any other error."""

import difflib
from itertools import chain

from cyclopts import CoercionError, CycloptsError, MissingArgumentError, UnknownCommandError, UnknownOptionError

from dagman.config import described, unknown
from dagman.errors import DagmanError


def refusal(error: CycloptsError) -> DagmanError:
    """`E-USAGE` with what is wrong and the way out, for an error of the parser."""
    verb = " ".join(["dagman", *(error.command_chain or ())])
    if isinstance(error, UnknownCommandError) and error.unused_tokens and error.app:
        return unknown("USAGE", error.unused_tokens[0], [name for name in error.app if not name.startswith("-")])
    if isinstance(error, UnknownOptionError):
        flags = chain.from_iterable(one.names for one in error.argument_collection if one.parse)
        return unknown("USAGE", error.token.keyword or error.token.value, list(flags))
    if isinstance(error, MissingArgumentError) and error.argument:
        return _missing(error, verb, error.argument.name)
    if isinstance(error, CoercionError) and error.argument:
        token, wanted = error.token or error.argument.tokens[-1], described(error.argument.hint)
        subject = token.keyword or error.argument.name
        return DagmanError("USAGE", subject, f"cannot be {token.value!r}", f"give {wanted}")
    error.verbose = False
    return DagmanError("USAGE", verb, " ".join(str(error).split()).rstrip("."), f"see {verb} --help")


def _missing(error: MissingArgumentError, verb: str, name: str) -> DagmanError:
    """A flag without its value, or a verb without what it needs, perhaps for a slip of the pen."""
    if error.keyword:
        return DagmanError("USAGE", error.keyword, "has no value", f"write {error.keyword} VALUE")
    given = [token.partition("=")[0] for token in error.unused_tokens or () if token.startswith("-")]
    near = difflib.get_close_matches(name, given, n=1)
    advice = f"did you mean {name} instead of {near[0]}?" if near else f"see {verb} --help"
    return DagmanError("USAGE", verb, f"lacks {name}", advice)
