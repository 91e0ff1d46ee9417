"""The commands: reading flags, calling the library, and printing. Nothing else imports this package."""
