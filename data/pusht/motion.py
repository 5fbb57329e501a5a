"""Human-like agent motions in Push-T: paths around the block, straight and curved pushes, bounded speed.

Everything is in world pixels and 0.1 s steps; a path is a list of target positions, one per step.
"""

import dataclasses

import numpy as np
import shapely
import shapely.ops
from jaxtyping import Float

from data.pusht.sim import AGENT_RADIUS, CENTRE_OF_GRAVITY, rotation, to_world

# The T in block coordinates, ordered so that (dy, -dx) of an edge points outwards.
OUTLINE = np.array([(-60, 0), (60, 0), (60, 30), (15, 30), (15, 120), (-15, 120), (-15, 30), (-60, 30)], np.float64)
EDGES = np.roll(OUTLINE, -1, axis=0) - OUTLINE
EDGE_LENGTHS = np.linalg.norm(EDGES, axis=1)
CLEARANCE = AGENT_RADIUS + 7.0
TOUCH = AGENT_RADIUS - 1.0
REACH = (12.0, 500.0)
ACCELERATION = 10.0
CRAWL = 2.0

Points = Float[np.ndarray, "n 2"]


@dataclasses.dataclass(frozen=True)
class Push:
    """A push: where on the outline (share of the perimeter), at which angle to the inward normal (radians), how far
    (pixels of agent travel after touching) and how much the direction turns along it (radians).
    """

    where: float
    angle: float
    length: float
    turn: float = 0.0


def contact(where: float) -> tuple[Float[np.ndarray, "2"], Float[np.ndarray, "2"]]:
    """Point on the outline at a share of its perimeter, and outward normal there, in block coordinates."""
    along = (where % 1.0) * EDGE_LENGTHS.sum()
    ends = np.cumsum(EDGE_LENGTHS)
    edge = min(int(np.searchsorted(ends, along, side="right")), len(ends) - 1)
    direction = EDGES[edge] / EDGE_LENGTHS[edge]
    point = OUTLINE[edge] + direction * (along - (ends[edge] - EDGE_LENGTHS[edge]))
    return point, np.array([direction[1], -direction[0]])


class Tee:
    """The block at a pose, with the polygons that motions keep clear of; pose is x, y (pixels), angle (radians)."""

    def __init__(self, pose: Float[np.ndarray, "3"]) -> None:
        self.pose = pose
        self.polygon = shapely.Polygon(to_world(pose, OUTLINE))
        hull = self.polygon.convex_hull
        self.keep_out = hull.buffer(CLEARANCE, quad_segs=3)
        self.blocked = hull.buffer(CLEARANCE - 2.0, quad_segs=3)
        shapely.prepare([self.polygon, self.keep_out, self.blocked])

    @property
    def centre(self) -> Float[np.ndarray, "2"]:
        """The centre of gravity in the world."""
        return centre(self.pose)


def centre(block: Float[np.ndarray, "3"]) -> Float[np.ndarray, "2"]:
    """The block's centre of gravity in the world."""
    return to_world(block, CENTRE_OF_GRAVITY)


def random_start(rng: np.random.Generator, low: float, high: float) -> Float[np.ndarray, "5"]:
    """Block centre uniform in [low, high]^2, any angle; agent uniform in [30, 482]^2, clear of the block."""
    angle = rng.uniform(0, 2 * np.pi)
    block = np.array([*(rng.uniform(low, high, 2) - rotation(angle) @ CENTRE_OF_GRAVITY), angle])
    tee = shapely.Polygon(to_world(block, OUTLINE))
    while True:
        agent = rng.uniform(30, 482, 2)
        if tee.distance(shapely.Point(agent)) > CLEARANCE:
            return np.array([*agent, *block])


def in_reach(points: Points) -> bool:
    """Whether the agent can reach all these points."""
    return bool(((points >= REACH[0]) & (points <= REACH[1])).all())


def push_path(push: Push, tee: Tee) -> Points | None:
    """Corner points of a push, from the stand-off to the end; None if the block or the border blocks it."""
    point, normal = contact(push.where)
    point, normal = to_world(tee.pose, point), rotation(tee.pose[2]) @ normal
    direction = rotation(push.angle) @ -normal
    touching = point + normal * AGENT_RADIUS
    gaps = 10.0 + 5.0 * np.arange(40)
    blocked = shapely.contains_xy(tee.keep_out, touching - direction * gaps[:, None])
    gap = gaps[int(blocked.argmin())]
    standoff = touching - direction * gap
    approach = shapely.LineString([standoff, touching])
    if not in_reach(standoff[None]) or tee.polygon.distance(approach) < TOUCH:
        return None
    pieces = 6
    headings = push.angle + push.turn * (np.arange(pieces) + 0.5) / pieces
    strides = np.stack([rotation(heading) @ -normal for heading in headings]) * push.length / pieces
    path = np.concatenate([[standoff, touching], touching + np.cumsum(strides, axis=0)])
    return path if in_reach(path) else None


def way_around(start: Float[np.ndarray, "2"], goal: Float[np.ndarray, "2"], tee: Tee) -> Points:
    """Corner points of the shortest path from start to goal that stays clear of the block and inside the border."""
    keep_out = tee.keep_out
    path = [start]
    if keep_out.contains(shapely.Point(start)):
        # Straight away from the hull, and a little beyond its margin, so that the remaining path no longer crosses it.
        nearest = np.array(shapely.ops.nearest_points(keep_out.exterior, shapely.Point(start))[0].coords[0])
        path.append(nearest + (nearest - start) / max(np.linalg.norm(nearest - start), 1e-6) * 3.0)
    if not tee.blocked.intersects(shapely.LineString([path[-1], goal])):
        return np.array([*path, goal])
    corners = np.array(keep_out.union(shapely.MultiPoint([path[-1], goal])).convex_hull.exterior.coords)[:-1]
    first = int(np.argmin(np.linalg.norm(corners - path[-1], axis=1)))
    last = int(np.argmin(np.linalg.norm(corners - goal, axis=1)))
    ring = np.arange(len(corners))
    one = corners[np.roll(ring, -first)[: (last - first) % len(ring) + 1]]
    other = corners[np.roll(ring[::-1], first + 1)[: (first - last) % len(ring) + 1]]
    ways = [np.concatenate([path, way, [goal]]) for way in (one, other)]
    return min(ways, key=lambda way: (not in_reach(way), polyline_length(way))).clip(*REACH)


def polyline_length(points: Points) -> float:
    """Length of a polyline in pixels."""
    return float(np.linalg.norm(np.diff(points, axis=0), axis=1).sum())


def timed(points: Points, speed: float, final_speed: float = CRAWL) -> Points:
    """Targets along a polyline, one per step: speed up by ACCELERATION per step to `speed`, brake to `final_speed`."""
    lengths = np.linalg.norm(np.diff(points, axis=0), axis=1)
    marks = np.concatenate([[0.0], np.cumsum(lengths)])
    travelled, velocity, stops = 0.0, CRAWL, []
    while travelled < marks[-1]:
        left = marks[-1] - travelled
        velocity = min(velocity + ACCELERATION, speed, np.sqrt(2 * ACCELERATION * left + final_speed**2))
        travelled += max(velocity, CRAWL)
        stops.append(min(travelled, marks[-1]))
    return np.stack([np.interp(stops, marks, points[:, axis]) for axis in (0, 1)], axis=-1)
