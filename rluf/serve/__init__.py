"""The service besides Ray: API, limits, batching, metrics, the feedback store, the web page, a client."""
