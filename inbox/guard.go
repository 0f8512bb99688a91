package inbox

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

var (
	errTxControl = errors.New("the handler must not end the transaction: return nil to commit it, an error to roll it back")
	errConnLost  = errors.New("connection to the database was lost")
)

// guard is the transaction that a handler sees: all of a pgx.Tx except its end.
// It refuses what it can see; what comes by other ways, such as Conn, is found
// out by check. All of it sends first what is in the pipeline.
type guard struct {
	pgx.Tx
	nested   bool  // a savepoint, which the handler may end
	over     bool  // it has
	tried    *bool // to end the transaction
	pipeline *pipeline
}

func newGuard(ctx context.Context, tx pgx.Tx) *guard {
	return &guard{Tx: tx, tried: new(bool), pipeline: &pipeline{ctx: ctx}}
}

func (g *guard) Begin(ctx context.Context) (pgx.Tx, error) {
	if err := g.flush(ctx); err != nil {
		return nil, err
	}
	tx, err := g.Tx.Begin(ctx)
	if err != nil {
		return nil, err
	}
	return &guard{Tx: tx, nested: true, tried: g.tried, pipeline: g.pipeline}, nil
}

func (g *guard) Commit(ctx context.Context) error {
	if !g.nested {
		return g.refuse()
	}
	if err := g.flush(ctx); err != nil {
		return err
	}
	g.over = true
	return g.Tx.Commit(ctx)
}

func (g *guard) Rollback(ctx context.Context) error {
	if !g.nested {
		return g.refuse()
	}
	if !g.over {
		g.pipeline.drop()
	}
	g.over = true
	return g.Tx.Rollback(ctx)
}

func (g *guard) Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error) {
	if endsTx(sql) {
		return pgconn.CommandTag{}, g.refuse()
	}
	if err := g.flush(ctx); err != nil {
		return pgconn.CommandTag{}, err
	}
	return g.Tx.Exec(ctx, sql, args...)
}

func (g *guard) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	if endsTx(sql) {
		return noRows{err: g.refuse()}, errTxControl
	}
	if err := g.flush(ctx); err != nil {
		return noRows{err: err}, err
	}
	return g.Tx.Query(ctx, sql, args...)
}

func (g *guard) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	if endsTx(sql) {
		return noRows{err: g.refuse()}
	}
	if err := g.flush(ctx); err != nil {
		return noRows{err: err}
	}
	return g.Tx.QueryRow(ctx, sql, args...)
}

func (g *guard) Prepare(ctx context.Context, name, sql string) (*pgconn.StatementDescription, error) {
	if endsTx(sql) {
		return nil, g.refuse()
	}
	if err := g.flush(ctx); err != nil {
		return nil, err
	}
	return g.Tx.Prepare(ctx, name, sql)
}

func (g *guard) SendBatch(ctx context.Context, b *pgx.Batch) pgx.BatchResults {
	for _, query := range b.QueuedQueries {
		if endsTx(query.SQL) {
			return pgx.FailedBatchResults(b, g.refuse())
		}
	}
	if err := g.flush(ctx); err != nil {
		return pgx.FailedBatchResults(b, err)
	}
	return g.Tx.SendBatch(ctx, b)
}

func (g *guard) CopyFrom(ctx context.Context, table pgx.Identifier, columns []string, rows pgx.CopyFromSource) (int64, error) {
	if err := g.flush(ctx); err != nil {
		return 0, err
	}
	return g.Tx.CopyFrom(ctx, table, columns, rows)
}

// Conn sends what earlier handlers have queued: a COMMIT by way of it would leave that out.
func (g *guard) Conn() *pgx.Conn {
	_ = g.flush(g.pipeline.ctx) // check finds the error
	return g.Tx.Conn()
}

// LargeObjects sends what is queued, as Conn does.
func (g *guard) LargeObjects() pgx.LargeObjects {
	_ = g.flush(g.pipeline.ctx)
	return g.Tx.LargeObjects()
}

func (g *guard) refuse() error {
	*g.tried = true
	return errTxControl
}

// noRows is the result of a query that was not sent. As in pgx it can be read
// although Query returned an error.
type noRows struct {
	pgx.Rows
	err error
}

func (noRows) Close()                        {}
func (noRows) Next() bool                    { return false }
func (n noRows) Scan(...any) error           { return n.err }
func (n noRows) Err() error                  { return n.err }
func (noRows) CommandTag() pgconn.CommandTag { return pgconn.CommandTag{} }

// check turns what the handler returned into what became of the transaction: nil
// if it is there to be committed.
func (g *guard) check(err error) error {
	conn := g.Tx.Conn().PgConn()
	switch {
	case conn.IsClosed():
		if err == nil {
			err = errConnLost
		}
	case conn.TxStatus() == 'I':
		err = errors.Join(ErrTxEnded, err)
	case err == nil && *g.tried:
		err = errTxControl
	case err == nil && g.pipeline.err != nil:
		err = g.pipeline.err
	case err == nil && conn.IsBusy():
		err = errors.New("the handler left rows of a query open")
	case err == nil && conn.TxStatus() == 'E':
		err = fmt.Errorf("the handler ignored an error of the database: %w", pgx.ErrTxCommitRollback)
	}
	return err
}

var (
	ends        = regexp.MustCompile(`(?i)^\s*(commit|end|abort|rollback|prepare\s+transaction)\b`)
	toSavepoint = regexp.MustCompile(`(?i)^\s*rollback(\s+work|\s+transaction)?\s+to\b`)
	dollarQuote = regexp.MustCompile(`^\$([A-Za-z_][A-Za-z0-9_]*)?\$`)
)

// endsTx reports whether one of the statements in sql ends the transaction.
func endsTx(sql string) bool {
	if !mayEnd(sql) { // most of all statements
		return false
	}
	for _, statement := range strings.Split(bare(sql), ";") {
		if ends.MatchString(statement) && !toSavepoint.MatchString(statement) {
			return true
		}
	}
	return false
}

// mayEnd reports whether one of the words that end a transaction stands somewhere in sql.
func mayEnd(sql string) bool {
	for i := range len(sql) {
		word := ""
		switch sql[i] | 0x20 { // in lower case
		case 'c':
			word = "commit"
		case 'e':
			word = "end"
		case 'a':
			word = "abort"
		case 'r':
			word = "rollback"
		case 'p':
			word = "prepare"
		default:
			continue
		}
		if len(sql)-i >= len(word) && strings.EqualFold(sql[i:i+len(word)], word) {
			return true
		}
	}
	return false
}

// bare returns sql with its comments, literals and quoted names left out, since a
// semicolon or COMMIT in them means nothing.
func bare(sql string) string {
	var b strings.Builder
	for sql != "" {
		n := quoted(sql)
		if n == 0 {
			if sql[0] == '\v' {
				b.WriteByte(' ') // as for PostgreSQL, not for package regexp
			} else {
				b.WriteByte(sql[0])
			}
			sql = sql[1:]
			continue
		}
		// A comment separates words; a literal does too, but is one itself.
		if sql[0] == '-' || sql[0] == '/' {
			b.WriteByte(' ')
		} else {
			b.WriteByte('?')
		}
		sql = sql[n:]
	}
	return b.String()
}

// quoted returns the length of the comment, literal or quoted name that sql
// begins with; all of it if that does not end, 0 if there is none. Doubled quotes
// are two literals in a row here, which comes to the same.
func quoted(sql string) int {
	opening, closing := sql[:1], ""
	switch {
	case strings.HasPrefix(sql, "--"):
		if i := strings.IndexAny(sql, "\n\r"); i >= 0 {
			return i + 1
		}
		return len(sql)
	case strings.HasPrefix(sql, "/*"):
		return comment(sql)
	case len(sql) > 1 && strings.EqualFold(sql[:2], "e'"):
		return escaped(sql)
	case sql[0] == '\'' || sql[0] == '"':
		closing = opening
	case sql[0] == '$':
		opening = dollarQuote.FindString(sql)
		closing = opening
	}
	if closing == "" {
		return 0
	}
	if i := strings.Index(sql[len(opening):], closing); i >= 0 {
		return len(opening) + i + len(closing)
	}
	return len(sql)
}

// comment returns the length of a block comment, which may hold others.
func comment(sql string) int {
	depth := 0
	for i := 0; i+1 < len(sql); i++ {
		switch sql[i : i+2] {
		case "/*":
			depth++
			i++
		case "*/":
			depth--
			i++
			if depth == 0 {
				return i + 1
			}
		}
	}
	return len(sql)
}

// escaped returns the length of a literal in which a backslash escapes a quote.
func escaped(sql string) int {
	for i := 2; i < len(sql); i++ {
		switch sql[i] {
		case '\\':
			i++
		case '\'':
			return i + 1
		}
	}
	return len(sql)
}
