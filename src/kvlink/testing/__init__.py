"""The conformance kit: what every provider has to do, as tests that run against any provider.

From the command line::

    kvlink conform NAME [--profile load|quick|full] [--option key=value] [--device cpu] [--junit F] [--json F]

With pytest, in a file of the provider's own tests::

    from kvlink.testing.pytest_suite import ProviderSuite

    class TestMine(ProviderSuite):
        provider = "mine"
        options = {"path": "fast"}

Cases run in a process of their own, so that a crash or a hang of the provider is one failed case. A skip comes only
from something that the provider declares (a capability, a kind of memory) and is counted with its reason.
"""

from .suite import Case, CaseResult, Settings, all_cases, select_cases

__all__ = ["Case", "CaseResult", "Settings", "all_cases", "select_cases"]
