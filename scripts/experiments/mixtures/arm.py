"""An arm with four joints in space, whose accelerations are to be learned.

Jordan & Jacobs 1994 (Neural Computation 6, section 4) learn the forward dynamics of such an arm:
from joint angles, velocities and torques to joint accelerations. They do not give its constants, so
those below are ours. The first joint turns the arm about the vertical, the others lift its three
links within a vertical plane. A mass is at the end of each link; each joint has the inertia of a
motor, and friction.
"""

from typing import NamedTuple

import numpy as np

JOINTS = 4
LENGTHS = np.array([0.5, 0.4, 0.3])
"""The links' lengths in meters, from the shoulder."""
MASSES = np.array([3.0, 2.0, 1.0])
"""Masses in kilograms, one at the end of each link."""
MOTORS = np.array([0.5, 0.3, 0.2, 0.1])
"""Inertias of the motors in kg m²; without them, an arm that points upwards could spin freely."""
FRICTION = np.array([0.5, 0.5, 0.3, 0.2])
"""Torque in N m against a velocity of 1 / s."""
GRAVITY = 9.81
ANGLES = np.array([np.pi, 2.0, 2.0, 2.0])
VELOCITIES = np.array([2.5, 2.5, 2.5, 2.5])
TORQUES = np.array([20.0, 20.0, 10.0, 5.0])
"""Largest inputs in radians, 1 / s and N m; with these, a linear model errs as theirs."""


class Links(NamedTuple):
    """The ends of the links of n arms.

    Attributes:
        radius, height: distance from the vertical axis and height in meters, (n, 3).
        radii, heights: their derivatives by the angles of joints 2 to 4, (n, 3, 3).
    """

    radius: np.ndarray
    height: np.ndarray
    radii: np.ndarray
    heights: np.ndarray


def sample(rows: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (rows, 12), which are angles, velocities and torques; accelerations (rows, 4)."""
    largest = np.concatenate([ANGLES, VELOCITIES, TORQUES])
    inputs = rng.uniform(-largest, largest, (rows, 3 * JOINTS))
    return inputs, accelerations(*np.split(inputs, 3, axis=1))


def accelerations(
    angles: np.ndarray,
    velocities: np.ndarray,
    torques: np.ndarray,
    friction: np.ndarray = FRICTION,
) -> np.ndarray:
    """The joint accelerations in 1 / s² by Lagrange's equations, (n, 4), as each argument."""
    links = positions(angles)
    force = torques - friction * velocities - bias(links, angles, velocities)
    return np.linalg.solve(inertia(links), force[:, :, None])[:, :, 0]


def positions(angles: np.ndarray) -> Links:
    """The ends of the links at the joint angles (n, 4)."""
    lifts = np.cumsum(angles[:, 1:], axis=1)  # of each link above the horizontal
    forward, upward = LENGTHS * np.cos(lifts), LENGTHS * np.sin(lifts)
    # moves[k, i, j]: joint j moves link i, which is a part of the way to end k
    moves = np.tril(np.ones((3, 3)))[:, :, None] * np.tril(np.ones((3, 3)))[None]
    return Links(
        radius=np.cumsum(forward, axis=1),
        height=np.cumsum(upward, axis=1),
        radii=-np.einsum("kij,ni->nkj", moves, upward),
        heights=np.einsum("kij,ni->nkj", moves, forward),
    )


def inertia(links: Links) -> np.ndarray:
    """The matrix of inertia in kg m², (n, 4, 4)."""
    n = len(links.radius)
    matrix = np.zeros((n, JOINTS, JOINTS))
    matrix[:, 0, 0] = links.radius**2 @ MASSES
    for part in (links.radii, links.heights):
        matrix[:, 1:, 1:] += np.einsum("k,nki,nkj->nij", MASSES, part, part)
    return matrix + np.diag(MOTORS)


def bias(links: Links, angles: np.ndarray, velocities: np.ndarray) -> np.ndarray:
    """The torques in N m that no acceleration needs: centrifugal, Coriolis and gravity, (n, 4)."""
    turn, lift = velocities[:, 0], velocities[:, 1:]
    lifts = np.cumsum(angles[:, 1:], axis=1)
    speeds = np.cumsum(lift, axis=1) ** 2  # of each link's direction, squared
    # what the ends' accelerations would be without joint accelerations, in the plane of the arm
    outward = -np.cumsum(LENGTHS * np.cos(lifts) * speeds, axis=1)
    outward -= links.radius * turn[:, None] ** 2
    upward = -np.cumsum(LENGTHS * np.sin(lifts) * speeds, axis=1) + GRAVITY
    torques = np.zeros_like(angles)
    change = np.einsum("nkj,nj->nk", links.radii, lift)
    torques[:, 0] = 2 * turn * ((links.radius * change) @ MASSES)
    torques[:, 1:] = np.einsum("k,nkj,nk->nj", MASSES, links.radii, outward)
    torques[:, 1:] += np.einsum("k,nkj,nk->nj", MASSES, links.heights, upward)
    return torques


def energy(angles: np.ndarray, velocities: np.ndarray) -> np.ndarray:
    """The kinetic and potential energy in joules, (n,)."""
    links = positions(angles)
    kinetic = np.einsum("ni,nij,nj->n", velocities, inertia(links), velocities) / 2
    return kinetic + GRAVITY * (links.height @ MASSES)
