"""The one error that users meet."""


class UserError(Exception):
    """Something the user can mend: one line naming file, field, value and remedy. Shown without traceback."""
