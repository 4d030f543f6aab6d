"""Give each device the rows that its windows read, where the height of maps is split.

A device holds some rows of a map and computes some rows of the next one. The windows of a
convolution or a pool also read rows that the neighbours above and below hold: the halo. Each device
sends these rows by a collective-permute. Their gradients go back the same way. (Dryden et al. 2019,
1903.06681, section III; GSPMD, 2105.04663, section 4.)

XLA can partition a convolution by itself. It then sends the map's halo again in the backward pass,
and that of the output's gradient; here only the gradient of the map's halo moves. XLA also gathers
whole maps in the gradient of a max pool whose rows do not divide.

Rows need not divide by the devices: each holds ceil(rows / devices), except that the last ones hold
fewer, or none. XLA pads their shards, and no number depends on the padding.

Shapes: N batch, H height, W width, C channels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cnn_spmd.errors import UserError


class Windows(NamedTuple):
    """The windows of a layer along the height of its maps."""

    rows: int  # of the map
    size: int  # rows of a window
    strides: int
    before: int  # rows of padding above the map
    count: int  # windows, which are the rows of the result


class Halo(NamedTuple):
    """The rows that devices exchange for a layer's windows."""

    windows: Windows
    devices: int  # that split the height
    mesh_axes: tuple[str, ...]  # along which they lie

    @property
    def held(self) -> int:
        """Return how many rows of the map a device holds."""
        return -(-self.windows.rows // self.devices)

    @property
    def computed(self) -> int:
        """Return how many rows of the result a device computes."""
        return -(-self.windows.count // self.devices)

    @property
    def read(self) -> int:
        """Return how many rows the windows of a device read."""
        return (self.computed - 1) * self.windows.strides + self.windows.size

    @property
    def above(self) -> int:
        """Return how many rows each device gets from the one above."""
        return max(0, *(device * self.held - self._start(device) for device in self._working))

    @property
    def below(self) -> int:
        """Return how many rows each device gets from the one below."""
        ends = []
        for device in self._working:
            last = min((device + 1) * self.computed, self.windows.count) - 1
            end = last * self.windows.strides - self.windows.before + self.windows.size
            ends.append(min(end, self.windows.rows) - (device + 1) * self.held)
        return max(0, *ends)

    @property
    def fits(self) -> bool:
        """Return whether the halo is no more than the neighbours hold."""
        return max(self.above, self.below) <= self.held

    @property
    def _working(self) -> range:
        """Return the devices that compute rows of the result."""
        return range(-(-self.windows.count // self.computed))

    def _start(self, device: int) -> int:
        """Return the map's row at which the first window of a device starts."""
        return device * self.computed * self.windows.strides - self.windows.before

    def refuse_too_large(self, name: str, where: str) -> None:
        """Raise UserError unless the halo fits; name: the layer's. where: mesh and scheme."""
        if self.fits:
            return
        axis = "+".join(self.mesh_axes)
        divisors = [n for n in range(1, self.devices) if self.devices % n == 0]
        works = [str(n) for n in divisors if self._replace(devices=n).fits]
        raise UserError(
            f"{name}: windows of {self.windows.size} rows on maps of {self.windows.rows} rows read "
            f"more rows than the neighbours hold on {self.devices} devices along mesh axis {axis} "
            f"{where}: expected {' or '.join(works)} devices along {axis}, or more than "
            f"{self.windows.count}, which split examples instead of rows"
        )

    def even(self, x_NHWC: jax.Array) -> jax.Array:
        """Return a map with as many rows of zeros at the end as make all shards equal."""
        rows = self.held * self.devices - x_NHWC.shape[1]
        return jnp.pad(x_NHWC, [(0, 0), (0, rows), (0, 0), (0, 0)]) if rows else x_NHWC

    def exchange(self, shard_NHWC: jax.Array, fill: float) -> jax.Array:
        """Return the rows that this device's windows read, [N, read, W, C].

        shard_NHWC: this device's rows of an `even` map. fill: what rows outside of the map hold.
        Runs inside shard_map.
        """
        above, below, axes = self.above, self.below, self.mesh_axes
        parts = [shard_NHWC]
        if above:
            down = [(device, device + 1) for device in range(self.devices - 1)]
            parts.insert(0, jax.lax.ppermute(shard_NHWC[:, -above:], axes, down))
        if below:
            up = [(device + 1, device) for device in range(self.devices - 1)]
            parts.append(jax.lax.ppermute(shard_NHWC[:, :below], axes, up))
        x_NHWC = jnp.concatenate(parts, 1)
        device = jax.lax.axis_index(axes)
        if fill:  # without a fill, the zeros of `even` and of ppermute stay
            row_H = device * self.held - above + jnp.arange(x_NHWC.shape[1])
            inside_H = (row_H >= 0) & (row_H < self.windows.rows)
            x_NHWC = jnp.where(inside_H[:, None, None], x_NHWC, fill)
        # Where in these rows the first window starts: further down (or up) with each device, unless
        # all devices compute windows of just the rows that they hold.
        starts = [above + self._start(device) - device * self.held for device in self._working]
        missing = max(starts) + self.read - x_NHWC.shape[1]
        if missing > 0:
            widths = [(0, 0), (0, missing), (0, 0), (0, 0)]
            x_NHWC = jnp.pad(x_NHWC, widths, constant_values=fill)
        shift = self.computed * self.windows.strides - self.held
        start = starts[0] + device * shift if shift else starts[0]
        return jax.lax.dynamic_slice_in_dim(x_NHWC, start, self.read, 1)
