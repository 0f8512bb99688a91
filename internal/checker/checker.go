package checker

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"
)

// Checker holds what is known of a run, in a database of its own.
type Checker struct{ conn *pgx.Conn }

// tables has what others tell. A message without a key has key NULL and seq 0. The hash
// covers body and headers. expected is what is to become of a message: "applied", or
// "parked" for poison.
const tables = `
CREATE TABLE consumers (consumer text NOT NULL);
CREATE TABLE committed (message_id uuid NOT NULL, key text COLLATE "C", seq bigint NOT NULL, hash bigint NOT NULL, expected text NOT NULL);
CREATE TABLE outcomes  (message_id uuid NOT NULL, outcome text NOT NULL);
CREATE TABLE wire      (pos bigint NOT NULL, message_id uuid NOT NULL, key text COLLATE "C", seq bigint NOT NULL, hash bigint NOT NULL, redelivered boolean NOT NULL);
CREATE TABLE applied   (pos bigint NOT NULL, consumer text NOT NULL, message_id uuid NOT NULL, key text COLLATE "C", seq bigint NOT NULL, hash bigint NOT NULL);
CREATE TABLE parked    (message_id uuid NOT NULL, consumer text NOT NULL, reason text NOT NULL);
`

// Columns of the tables, in the order in which Load and Wire take them.
var columns = map[string]string{
	"committed": "message_id, key, seq, hash, expected",
	"wire":      "pos, message_id, key, seq, hash, redelivered",
	"applied":   "pos, consumer, message_id, key, seq, hash",
	"parked":    "message_id, consumer, reason",
}

// New makes the tables in conn's database. Each of the consumers is to apply every message.
func New(ctx context.Context, conn *pgx.Conn, consumers ...string) (*Checker, error) {
	if _, err := conn.Exec(ctx, tables); err != nil {
		return nil, err
	}
	_, err := conn.Exec(ctx, "INSERT INTO consumers SELECT unnest($1::text[])", consumers)
	return &Checker{conn}, err
}

// Load copies the rows of a query from another database into a table.
func (c *Checker) Load(ctx context.Context, table string, from *pgx.Conn, query string) error {
	if columns[table] == "" {
		return fmt.Errorf("load %s: no such table", table)
	}
	reader, writer := io.Pipe()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		_, err := from.PgConn().CopyTo(ctx, writer, "COPY ("+query+") TO STDOUT")
		writer.CloseWithError(err)
		return err
	})
	group.Go(func() error {
		_, err := c.conn.PgConn().CopyFrom(ctx, reader, fmt.Sprintf("COPY %s (%s) FROM STDIN", table, columns[table]))
		reader.CloseWithError(err)
		return err
	})
	if err := group.Wait(); err != nil {
		return fmt.Errorf("load %s: %w", table, err)
	}
	return nil
}

// Seen is a message as it was on the wire.
type Seen struct {
	MessageID   uuid.UUID
	Key         *string
	Seq, Hash   int64
	Redelivered bool // to whoever watches the wire, so perhaps not new
}

// Wire notes what was on the wire, in the order in which it was, from position pos on.
func (c *Checker) Wire(ctx context.Context, pos int64, seen []Seen) error {
	rows := pgx.CopyFromSlice(len(seen), func(i int) ([]any, error) {
		s := seen[i]
		return []any{pos + int64(i), s.MessageID, s.Key, s.Seq, s.Hash, s.Redelivered}, nil
	})
	_, err := c.conn.CopyFrom(ctx, pgx.Identifier{"wire"}, strings.Split(columns["wire"], ", "), rows)
	return err
}

// Outcomes of a write, as its client saw them.
const (
	OK      = "ok"
	Async   = "async" // ok, but with synchronous_commit off: a crash may take it back
	Failed  = "failed"
	Unknown = "unknown"
)

// Outcomes reads lines of outcome and message ID, such as "ok 0198...". A line that is cut
// off at the end was written by a process that died: it is as unknown as one that is not there.
func (c *Checker) Outcomes(ctx context.Context, lines io.Reader) error {
	all := bufio.NewReader(lines)
	rows := pgx.CopyFromFunc(func() ([]any, error) {
		line, err := all.ReadString('\n')
		if err == io.EOF {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		outcome, id, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		messageID, err := uuid.Parse(id)
		if err != nil {
			return nil, fmt.Errorf("outcome %q: %w", line, err)
		}
		return []any{messageID, outcome}, nil
	})
	_, err := c.conn.CopyFrom(ctx, pgx.Identifier{"outcomes"}, []string{"message_id", "outcome"}, rows)
	return err
}
