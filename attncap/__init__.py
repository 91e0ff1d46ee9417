"""tmp"""
from attncap.errors import CallError, UserError
