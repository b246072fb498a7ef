"""One module a group of routes; `app.factory` puts them together."""
