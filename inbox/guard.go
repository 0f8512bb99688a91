package inbox

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
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
	if err := g.allow(ctx, sql); err != nil {
		return pgconn.CommandTag{}, err
	}
	return g.Tx.Exec(ctx, sql, args...)
}

func (g *guard) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	if err := g.allow(ctx, sql); err != nil {
		return pgx.FailedBatchResults(&pgx.Batch{}, err).Query()
	}
	return g.Tx.Query(ctx, sql, args...)
}

func (g *guard) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	if err := g.allow(ctx, sql); err != nil {
		return pgx.FailedBatchResults(&pgx.Batch{}, err).QueryRow()
	}
	return g.Tx.QueryRow(ctx, sql, args...)
}

func (g *guard) Prepare(ctx context.Context, name, sql string) (*pgconn.StatementDescription, error) {
	if err := g.allow(ctx, sql); err != nil {
		return nil, err
	}
	return g.Tx.Prepare(ctx, name, sql)
}

func (g *guard) SendBatch(ctx context.Context, b *pgx.Batch) pgx.BatchResults {
	all := make([]string, len(b.QueuedQueries))
	for i, query := range b.QueuedQueries {
		all[i] = query.SQL
	}
	if err := g.allow(ctx, all...); err != nil {
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
	_ = g.flush(g.pipeline.ctx) // check finds the error
	return g.Tx.LargeObjects()
}

// allow refuses statements that end the transaction, and sends what comes before others.
func (g *guard) allow(ctx context.Context, statements ...string) error {
	if slices.ContainsFunc(statements, endsTx) {
		return g.refuse()
	}
	return g.flush(ctx)
}

func (g *guard) refuse() error {
	*g.tried = true
	return errTxControl
}

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
	dollarQuote = regexp.MustCompile(`^\$([A-Za-z_\x80-\x{10FFFF}][A-Za-z0-9_\x80-\x{10FFFF}]*)?\$`)
	word        = regexp.MustCompile(`^[A-Za-z_\x80-\x{10FFFF}][A-Za-z0-9_$\x80-\x{10FFFF}]*`)
)

// endsTx reports whether one of the statements in sql ends the transaction.
func endsTx(sql string) bool {
	if !mayEnd(sql) { // most of all statements
		return false
	}
	return slices.ContainsFunc(strings.Split(bare(sql), ";"), func(statement string) bool {
		return ends.MatchString(statement) && !toSavepoint.MatchString(statement)
	})
}

// isSeveral reports whether sql is more than one statement.
func isSeveral(sql string) bool {
	if !strings.Contains(sql, ";") {
		return false
	}
	_, rest, _ := strings.Cut(bare(sql), ";")
	return strings.Trim(rest, "; \t\n\r\v\f") != ""
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
			plain := word.FindString(sql) // whole: the end of name'x' is no e'x'
			if plain == "" {
				plain = sql[:1]
			}
			b.WriteString(strings.ReplaceAll(plain, "\v", " ")) // as for PostgreSQL, not for package regexp
			sql = sql[len(plain):]
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

// continued finds what lies between two parts of one literal.
var continued = regexp.MustCompile(`^[ \t\f\v]*(--[^\n\r]*)?[\n\r]\s*(--[^\n\r]*[\n\r]\s*)*'`)

// escaped returns the length of a literal in which a backslash escapes a quote, also if it
// goes on in another line.
func escaped(sql string) int {
	for i := 2; i < len(sql); i++ {
		switch sql[i] {
		case '\\':
			i++
		case '\'':
			gap := len(continued.FindString(sql[i+1:]))
			if gap == 0 {
				return i + 1
			}
			i += gap
		}
	}
	return len(sql)
}
