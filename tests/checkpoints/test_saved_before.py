"""Optimizers saved before the package became a tree of folders: they load, and step on.

Both texts are of the optimizer that ``_stepped(2)`` makes.
"""

from __future__ import annotations

import io
import pickle
import zlib
from base64 import b64decode

import pytest
import torch

from adamal_kernels import AdamAL, L2Ball
from adamal_kernels.verify import different_values

PICKLED = """
eNrdl01sG0UUx/0VOzjOB2kapRRQQQUcBYztOPa6SnBb0vTgYNqAkCVUrca7Y882a+/XbD5QIiUVSeNo1QNd6AUJEJcicUCCY9
L0gOACHKhAIKEekBAgIcGND6HCW+/KHyVWc+CS7MHemfffNzO/fTtv3orv9TO9rtplDCEelZHIzmK1gkUtIslUKAuvYNU0/KfA
dGravGoOr5rLZtjo5HER6SLVai2PqJpnMzcdPx0FTJEGHb98Zl2fn838+vsX3w5eHlk3DS+WwfLMmcUr30eNE0ZoHgslQlkec2
gRnvjAcRFAZa2kIt6sGp1ltFCbBtwHipKKEUfMnBHkkEx1FRVEy9DDC8UiVnGFCk5PR1HXMA/CQfAt6bKIebZlsKrRWxCQxnKS
qmKOClLF3DCCsipddFo5I1BA3Cyu8KZxn4pr7jls6kaHRhHFptHFSaJoizVoOUR4gaPAyegs6IJIBcvkc/rWzBmAFaKSypEIq1
NBBGM/q2JLyrMyUlEZU+B91STHmgwUVzRJZefiYAgb3fbzGvyhEkyjjxUlxLNFVSqzhUWKNVCdPuR2uVY8m0Hx7zen/jx28fq5
I5EVz3M/e+F3WXGF831AGdZKJVgDO4dVDRahuEGQ7waLKFAqYhaWLqCK4tnIB6GTLsqY1eBFaIp3WfGF8x3QqRFJpUpH1pP3Qk
uoUMWf9eV9lg+pUlICWZ+uw5jhfMAS21NWXFxtCcEpmDh9we4MKu58D2jSifgYk2BS6XSMScUV2y8n64o3689RxXcevF1QXLtp
3Sjit+PHdeuHOzcyh5/ODKx37jzU9XIm9dV32/PX3Du1V5B1ZT1Z77qZ9Wbd62aVDBldz6s8vF5+0n5PwzMmBd0GicDdZbizYt
ynUSyb5HiYPPHsP/sX7VgslhhLJtLJFrTuXdE2tIDW7apfJx2Mw8PVGiILlhHACzKL5ko2on0egLDysWRyNJrYQwA2tE0BGH7/
yvj4yub27b/wBIr8uPV1z6db8RePbe0agHWGQYchqykHBWMyPgrf6N4wOtomjPM7DzOv3bmWRoOT6feOvsG4bvac+Ph2kLkHxj
Lsw4IsCrCV2hhD+wHjpKRD7moXjnEmloy2cPS0DUdbCxw9DkdzZOT8R5fezvw089TQW5nVTIMfkMu6W/np5FGbWte+TyKJsdFY
axLxtU0ithag+Rxoj90K7Cx8s5lZemnpxuLq0Xry8K0BsrUmYC2JgiQPQo5IpqKxu8i1zRGO9t45gkwchLiysiLDJFN7iauGti
muHjz37nj/8Uvb0Q/nJt559eR227giUweEV5yJp0aTe+PlaJt4/bH0OHPkyY30lwybvv7JI+m2vHTdCNUO0WxJhSO/Zl4ww9bR
zV/rtJokgciA8cBdhU7j0A/ncf90/DQSxUap44c6RNCteuY3pzrx8kIZhtYLJFCvekjnbvUOCdZrHdJVL29IqEq6q6QnR3qrpK
9K7s+R/io5tEEOk0Hd2kKWYaYF9H97H8jVBsBGDws1FWvVV2xFUstNKwuxIpQ8ms0PSqRubVaQZSidrMOv5iRTz34Ix2mQ7BqN
0QR8jlEmupe9ra5t3dvslPrf/U0vRP4FI3SqMg==
"""

STATE_DICT = """
eNq9Vl9sU1UYv127bivQDdQx/k1QxM5tXf+vHRuddbTChdIVkBsSUu/as94rt2u/e8/dAG2C6IAagokx4hNqeNHERBNNfGGRB4
MvagImJCaGEH0QjQm+YXwwnnNv6e69AwYj8STNaW/P78/3nfN952ZYu4NhWluZBaODWcXwcl4Qp9FAgce8t3JYSibczEHTON5U
BcbDNROAgnmMwFaFJg/LVMHu4RzaU1QBRx6XCZU3p2JRUlw5GU2oolTIYTSllOXcdMAFzR4P16KtL8t8EYFTh7iSUpnHe/WHLm
jhbGSND1o5O5nzFRXaWBsG1zjL9PTU8vmyJKE8FstTimuPXEAyKoyJeeyCZT1ZWI5hRRbcmgo6Usnx00VoF4iu4BR0Xj90CG2s
E8NKwsc2sfaTsIq1s7aT8FhNoBSPY3giC52ca54ipwCsNrEEoEtnWdNgWauzrNNZ1mPYkIVujaWkSlisSCKS4UmdpR73WFmdkF
Aj8I0adRA2EeomDE/p1ITzadZGp8069TMYtmThWZUl20DIHCZjIegRtHQ9p6dLQ/Ri6MtCv2DORBi8ZKkDwwAVcsyCj7XNgl+H
BDAEsxASzGFHIKxDInXIIIVEdUgMw1AWtqoqt5wsrfAyX8oV5bJaUWD4EIx4qrDNo+WjIpdf0XcQ4lUY9Wj7rCAMz3NO8m1XIM
FLEiS0HzJfEFUFXkjF/9KPrLa4IJZgjLWpXBP5IcmwPRW/VP+bntIJhHkFkqn4n9/R8X0qfuv2Dz91nuo9CSkNj4inF1Pbth89
+4vvzJDmdwaJRQHnCijPH4UdqfjndT56kviSUiRGYGeNo0VU4o+IJfEYAram/T1ZlhGfF2BXWgsvz1ewKvNkZ2F3jXNrdicnyT
mdwqL2NF3TXE6qCirAnjTXSZegPMmUhAo5k5FMjWunAYm8ksuXZbmetvHTmvAEnz+MpgqQ5dpoqpAmkkewV0udtgMK7DsE+1mG
V6vwkkeYT5Rw1/QcEObTIsxnQdhZE9iasCst7K4J6ZqwJy1kasL4aSGeFrLCXoFocKyNV5HqzbAtrd4dN17tJ42BfjL3bD6rGX
ej+XhJDks8zk0jWSEBJhMuQw/yU86vbv38Bj2C9HNvzrXM4Dxnvc3keEksTpVI+pOJoKW1PdCIhKiB+Az8To9b030NrGTiDQMT
RzEq0w6VTGxdiu6dIYkYS4h6mB35dQ3dWud9PbiZbaauPuBLJoYewQChHKXqZ86/f4C2e8ci6qNmdX8yMfwo4R/0fHp2ePj4W3
PX/0EjvPe3i9fc314M7Nt4kXqqXh4+10VUuxbx1Gf2FEgmPA/saebr7ug7/56L8Z1jsU/WvRdlLrmHvrnuilL9tyudM0vQDz6M
/ru9veNfnvgwfjPb3/VB/PU41T115cKPHdoNfn/dkFk3lEz4mP95/8OPuv/rMxeGV20+Mef7YnrkozdH56iX4vLbqSXEH1lK/H
+/tiW6pu907Go0F/v48qYY1b8xt2zD4vrtTLCh32htAw9rIOiiilfOF/cv3n+6mcB8A9RCVpAskg54jKc3R04sJBPehzTgi0Rj
4UAsHAkNRsMBXyQcHoz6gxF/yB+M+vzBYNgfCQyGfYPU5R87sshDfHg0lzZqtuHTeC10LHBufQ+1oo0XwGoTsupg7nWRWEmMTX
ytieSKkWTBzWHlMTbilSaebDOz8AKwwo2V5DbBrzUzlt5txRo7nhm7z2nB+q1YY7cyY29asQEr1thxzFihxYINPni8N6zYkBVr
rHRLvK0WbNiKNVapRdeKjVixxnprN2FfbmOsVW0FG8ug2wS+agDfvUAzrNPZd6ec7f0N5ArLPGjX5yMufSY4+lLIfFZfoL8pNT
t1zAptvb72P5rDU0g=
"""


def _values(seed: int, *shape: int) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * 37 + seed * 11) % 64 - 32).reshape(shape).float() / 32


def _new() -> AdamAL:
    params = [torch.nn.Parameter(_values(1, 2, 3)), torch.nn.Parameter(_values(2, 4))]
    groups = [
        {"params": params[:1], "projection": L2Ball(1.0, dim=1)},
        {"params": params[1:]},
    ]
    return AdamAL(groups, lr=0.125, weight_decay=0.0625, max_grad_norm=1.0, backend="reference")


def _params(optimizer: AdamAL) -> list[torch.Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _step(optimizer: AdamAL, seed: int) -> None:
    for param in _params(optimizer):
        param.grad = _values(seed, *param.shape)
    optimizer.step()
    optimizer.zero_grad()


def _stepped(count: int) -> AdamAL:
    optimizer = _new()
    for seed in range(3, 3 + count):
        _step(optimizer, seed)
    return optimizer


def _unpickled() -> AdamAL:
    return pickle.loads(zlib.decompress(b64decode(PICKLED)))


def _restored() -> AdamAL:
    optimizer = _new()
    saved = torch.load(io.BytesIO(zlib.decompress(b64decode(STATE_DICT))), weights_only=True)
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        for param, value in zip(_params(optimizer), _params(_stepped(2)), strict=True):
            param.copy_(value)
    return optimizer


def _held(optimizer: AdamAL) -> list[dict[str, torch.Tensor]]:
    return [{"param": param, **optimizer.state[param]} for param in _params(optimizer)]


@pytest.mark.parametrize("loaded", [_unpickled, _restored])
def test_what_was_saved_before_loads_and_steps_on(loaded):
    optimizer, expected = loaded(), _stepped(2)
    options = [
        [{k: v for k, v in group.items() if k != "params"} for group in groups]
        for groups in (optimizer.param_groups, expected.param_groups)
    ]
    assert options[0] == options[1]
    assert optimizer.max_grad_norm == expected.max_grad_norm
    assert different_values(_held(optimizer), _held(expected)) == []

    for seed in (5, 6):
        _step(optimizer, seed)
        _step(expected, seed)

    assert different_values(_held(optimizer), _held(expected)) == []
