package qcow2

import "context"

// Check looks at nothing yet.
func (im *Image) Check(ctx context.Context, report func(string)) error { return ctx.Err() }
