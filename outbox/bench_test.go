package outbox_test

import (
	"context"
	"net"
	"sync/atomic"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/txbox/txbox/internal/testenv"
	"github.com/txbox/txbox/outbox"
)

// countingConn counts the writes to the server that follow a read from it: each
// is a round trip.
type countingConn struct {
	net.Conn
	trips   *atomic.Int64
	reading bool
}

func (c *countingConn) Write(b []byte) (int, error) {
	if c.reading {
		c.reading = false
		c.trips.Add(1)
	}
	return c.Conn.Write(b)
}

func (c *countingConn) Read(b []byte) (int, error) {
	c.reading = true
	return c.Conn.Read(b)
}

func benchmark(b *testing.B, transaction func(ctx context.Context, conn *pgx.Conn, w outbox.Writer) error) {
	db := testenv.Schema(b)
	config, err := pgxpool.ParseConfig(db.URL)
	if err != nil {
		b.Fatal(err)
	}
	var trips atomic.Int64
	dial := config.ConnConfig.DialFunc
	config.ConnConfig.DialFunc = func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := dial(ctx, network, addr)
		return &countingConn{Conn: conn, trips: &trips}, err
	}
	ctx := context.Background()
	conn, err := pgx.ConnectConfig(ctx, config.ConnConfig)
	if err != nil {
		b.Fatal(err)
	}
	defer conn.Close(ctx)
	if _, err := conn.Exec(ctx, "CREATE TABLE "+db.Table("business")+" (id bigint)"); err != nil {
		b.Fatal(err)
	}
	writer := outbox.Writer{Schema: db.Schema}
	business = "INSERT INTO " + db.Table("business") + " VALUES (1)"
	if err := transaction(ctx, conn, writer); err != nil { // prepares the statements
		b.Fatal(err)
	}
	b.ReportAllocs()
	trips.Store(0)
	for b.Loop() {
		if err := transaction(ctx, conn, writer); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(trips.Load())/float64(b.N), "round-trips/op")
}

var business string

var benchMessage = outbox.Message{
	Exchange: "orders", RoutingKey: "order.placed", Key: "order-1", Type: "order.placed", Payload: make([]byte, 512),
	Headers: map[string]string{"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"},
}

// BenchmarkTransaction is a one-row business transaction with and without one
// message.
func BenchmarkTransaction(b *testing.B) {
	b.Run("without", func(b *testing.B) {
		benchmark(b, func(ctx context.Context, conn *pgx.Conn, _ outbox.Writer) error {
			return pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
				_, err := tx.Exec(ctx, business)
				return err
			})
		})
	})
	b.Run("Write", func(b *testing.B) {
		benchmark(b, func(ctx context.Context, conn *pgx.Conn, w outbox.Writer) error {
			return pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
				if _, err := tx.Exec(ctx, business); err != nil {
					return err
				}
				return w.Write(ctx, tx, benchMessage)
			})
		})
	})
	b.Run("Queue", func(b *testing.B) {
		benchmark(b, func(ctx context.Context, conn *pgx.Conn, w outbox.Writer) error {
			return pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
				batch := &pgx.Batch{}
				batch.Queue(business)
				if err := w.Queue(ctx, batch, benchMessage); err != nil {
					return err
				}
				return tx.SendBatch(ctx, batch).Close()
			})
		})
	})
}
