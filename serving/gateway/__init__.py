"""The engine behind the HTTP API that everybody knows, for many tenants."""
