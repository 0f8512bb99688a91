// Package checker says after a run under faults whether anything was lost, doubled,
// reordered or changed. It is told what was committed, what was on the wire and what took
// effect, each as rows of a table, and asks PostgreSQL, which sorts on disk: ten million
// messages need no more memory than ten.
//
//	c, err := checker.New(ctx, conn, "till")     // a database of its own
//	err = c.Load(ctx, "committed", shop, query)  // and "applied", "parked"
//	err = c.Outcomes(ctx, file)                  // what clients saw
//	violations, err := c.Check(ctx, allowed)
//
// Each violation names its invariant, counts, and shows the lives of the first messages
// that break it: written, on the wire, applied, parked.
package checker
