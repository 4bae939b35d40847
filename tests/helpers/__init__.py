"""What tests share. Test files import from here, and never from each other."""

import pkgutil

import pytest

# So that a failing assertion of a helper shows its values, as one of a test does.
pytest.register_assert_rewrite(*(f"{__name__}.{module.name}" for module in pkgutil.iter_modules(__path__)))
