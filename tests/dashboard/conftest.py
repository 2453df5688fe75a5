"""The pages of real APIs: those of the API's own tests."""

from tests.api.conftest import api, api_broker, fresh_api, guarded, sources_root

__all__ = ["api", "api_broker", "fresh_api", "guarded", "sources_root"]
