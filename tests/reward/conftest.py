"""A busy machine is no reason to fail: hypothesis's limit on an example's time is off."""

from hypothesis import settings

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
