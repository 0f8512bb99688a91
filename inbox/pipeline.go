package inbox

import (
	"context"
	"errors"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
)

// Pipeline returns a batch for the statements of a handler that needs no answer to them.
// They are sent together with those of the other messages of a transaction, when all
// handlers have returned or one of them uses tx, and so cost no round trip each; with COMMIT,
// too, if no functions are given to them:
//
//	inbox.Pipeline(tx).Queue("INSERT INTO receipts VALUES ($1)", m.ID)
//	err := outbox.Queue(ctx, inbox.Pipeline(tx), receipt)
//
// What fails is the failure of the message whose handler queued it, as if that had returned
// the error. So is what fails in a function that is given to a queued statement, such as
// one that counts the rows affected. Statements run in the order in which they were
// queued, before any that a handler sends through tx afterwards, and before tx.Conn returns.
// So tx may return the error of what another message's handler has queued: return it, what
// follows in the transaction is rolled back all the same. All that is sent after the
// handlers is bounded by one Config.Timeout.
//
// Queue one statement at a time, more are refused; and arguments that do not change: they
// are read when they are sent.
//
// tx is the transaction that a Handler or the function of Handle was given, or one begun in
// it; Pipeline panics if it is another. The batch is not to be used after the handler has
// returned.
func Pipeline(tx pgx.Tx) *pgx.Batch {
	g, ok := tx.(*guard)
	if !ok {
		panic("inbox: Pipeline: tx is not the transaction that the handler was given")
	}
	return &g.pipeline.Batch
}

// errUnread is there while results are read.
var errUnread = errors.New("a function given to a queued statement did not return, or used tx")

// errSeveral: in the simple protocol the results would be taken for those of others.
var errSeveral = errors.New("more than one statement was queued in one string")

// pipeline holds the statements of a transaction that are yet to be sent.
type pipeline struct {
	pgx.Batch
	ctx     context.Context // of the handler that runs
	at      int             // the index of its message
	of      []int           // whose each statement is
	err     error           // of the first that failed,
	culprit int             // and whose that was; -1: nobody knows
}

// settle notes whose the statements are that were queued since.
func (p *pipeline) settle() {
	for len(p.of) < p.Len() {
		p.of = append(p.of, p.at)
	}
}

// drop forgets what a savepoint is rolled back with.
func (p *pipeline) drop() { p.Batch, p.of, p.err = pgx.Batch{}, nil, nil }

// flush sends what is queued, also by the functions of what was, and returns the error of
// it, or of an earlier flush. After what may end the transaction unseen it looks.
func (g *guard) flush(ctx context.Context) error {
	p := g.pipeline
	for p.settle(); p.err == nil && p.Len() > 0; {
		n := p.Len()
		if i := slices.IndexFunc(p.QueuedQueries, isVeiled); i >= 0 {
			n = i + 1
		}
		p.err = g.send(ctx, n, false)
	}
	return p.err
}

// flushAndCommit is flush with a COMMIT in the same round trip, which the server leaves out
// if what is before it fails.
func (g *guard) flushAndCommit(ctx context.Context) error {
	g.pipeline.err = g.send(ctx, g.pipeline.Len(), true)
	return g.pipeline.err
}

// isPlain reports whether something is queued, and nothing that may end the transaction
// unseen or refuse a result after a COMMIT was sent.
func (p *pipeline) isPlain() bool {
	return p.Len() > 0 && !slices.ContainsFunc(p.QueuedQueries, func(q *pgx.QueuedQuery) bool { return q.Fn != nil || isVeiled(q) })
}

// isVeiled reports whether nobody can tell what a statement is before it is sent: it is the
// name of a prepared one, or SQL that is rewritten.
func isVeiled(q *pgx.QueuedQuery) bool {
	if len(q.Arguments) > 0 {
		switch q.Arguments[0].(type) {
		case pgx.NamedArgs, pgx.StrictNamedArgs: // rewrite arguments alone
		case pgx.QueryRewriter:
			return true
		}
	}
	return !strings.ContainsAny(q.SQL, " \t\n")
}

// send sends the first n statements, and COMMIT.
func (g *guard) send(ctx context.Context, n int, commit bool) error {
	p := g.pipeline
	batch, of, at := pgx.Batch{QueuedQueries: p.QueuedQueries[:n:n]}, p.of[:n:n], p.at
	defer func() { p.at = at }()
	p.Batch, p.of, p.culprit = pgx.Batch{QueuedQueries: p.QueuedQueries[n:]}, p.of[n:], -1
	for i, q := range batch.QueuedQueries {
		if endsTx(q.SQL) {
			p.culprit = of[i]
			return g.refuse()
		}
		if isSeveral(q.SQL) {
			p.culprit = of[i]
			return errSeveral
		}
		read := q.Fn
		q.Fn = func(results pgx.BatchResults) (err error) {
			p.culprit, p.at = of[i], of[i]
			if read == nil {
				_, err = results.Exec()
				return err
			}
			defer p.settle()
			return read(results)
		}
	}
	if commit {
		batch.Queue("COMMIT").Fn = func(results pgx.BatchResults) error {
			p.culprit = -1
			tag, err := results.Exec()
			if err == nil && tag.String() == "ROLLBACK" {
				err = pgx.ErrTxCommitRollback
			}
			return err
		}
	}
	p.err = errUnread
	err := sound(g.Tx.SendBatch(ctx, &batch).Close())
	if err == nil && !commit && g.Tx.Conn().PgConn().TxStatus() == 'I' {
		err = ErrTxEnded
	}
	return err
}

// culprit returns whose fault a verdict is: that of the message whose handler runs, unless
// it met with the failure of a statement of an earlier one; -1 if nobody knows.
func (u unit) culprit(g *guard, v verdict) int {
	switch p := g.pipeline; {
	case len(u.items) == 1:
		return 0
	case p.err != nil && (v != ended || errors.Is(p.err, ErrTxEnded)):
		return p.culprit
	default:
		return p.at
	}
}
