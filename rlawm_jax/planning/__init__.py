"""Planning in the world model: action sequences whose imagined end comes close to a goal frame."""
