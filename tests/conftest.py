"What several test files share."
import pytest
import torch


@pytest.fixture
def one_thread():
    "Tiny models are fastest on one thread."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
