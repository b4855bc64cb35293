"""The one place that knows which steps are whole, where they are, and which of them all ranks restore.

`service` drives the rules of `protocol`; `journal` remembers its decisions; `server` and `client` carry it over HTTP;
`ray_actor` hosts the same thing in a Ray actor. Nothing here is on the path of a healthy step.
"""
